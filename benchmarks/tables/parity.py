"""The tables of benchmarks/parity.py on networks and formats of export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OURS = {
    "mlp": "our MLP", "dit": "our DiT", "stacked": "two of our DiT in series", "edm2": "EDM2",
    "edm_ddpmpp": "EDM DDPM++", "edm_ddpmpp, ncsnpp": "EDM NCSN++", "edm_adm": "EDM ADM",
}  # fmt: skip
"""Names of networks that are not classes of diffusers."""


def format_tables(
    found: Mapping[str, Mapping[str, float | str]], networks: Sequence[str], readers: Mapping[str, str]
) -> dict[str, dict]:
    """The table network x format, and that of refusals by reason.

    found: by network and format the largest difference, or the reason why there is none. readers: what reads a format.
    """
    rows, reasons = [["loads in", *readers.values()]], {}
    for network in (one for one in networks if one in found):
        name, cells = OURS.get(network, network), {one: found[network].get(one, "") for one in readers}
        rows.append([name, *(_cell(cell) for cell in cells.values())])
        for one, cell in cells.items():
            if isinstance(cell, str) and cell:
                reasons.setdefault(cell, []).append((one, name))
    refused = [
        [_listed(one for one, _ in where), _listed(name for _, name in where), reason]
        for reason, where in reasons.items()
    ]
    return {
        "parity_formats": {"columns": ["network", *readers], "rows": rows},
        "parity_refused": {"columns": ["formats", "networks", "why not"], "rows": refused},
    }


def _cell(value: float | str) -> str:
    return ("no" if value else "") if isinstance(value, str) else f"{value:.1e}" if value else "0"


def _listed(values) -> str:
    return ", ".join(dict.fromkeys(values))

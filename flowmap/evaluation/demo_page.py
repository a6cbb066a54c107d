"""The page itself, in Gradio, which only this file imports (extra `demo`)."""

from __future__ import annotations

import inspect
import re
from typing import Any

from flowmap.base.progress import LogFunction
from flowmap.evaluation.demo import MOST, NONE, Demo, cost, shown

ATTRIBUTE = "attribute_"  # before the name of an attribute of sentences, in the API's parameters
NEEDED = "demo: needs gradio: pip install 'flowmap-distillation[demo]'"


def page(demo: Demo) -> Any:
    """The page as gradio.Blocks; its function `draw` is also an API of the server.

    Raises ValueError if gradio is not installed.
    """
    gradio = _gradio()
    config = demo.student.config
    with gradio.Blocks(title=f"flowmap: {config.recipe}", analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(f"# {config.recipe}\n\n{_about(demo)}")
        with gradio.Row():
            names, inputs = _inputs(gradio, demo)
            button = gradio.Button("Draw", variant="primary", min_width=90)
        outputs = _outputs(gradio, demo)

        def draw(*values: Any) -> list[Any]:
            try:
                drawn = demo.draw(**_arguments(names, values))
            except ValueError as error:
                raise gradio.Error(str(error)) from error
            return [value for one in drawn for value in (_heading(one.label, cost(one)), shown(one))]

        _name_parameters(draw, names)
        button.click(draw, inputs, outputs, api_name="draw")
        if config.text is None:
            blocks.load(draw, inputs, outputs, api_visibility="private")
    return blocks


def serve(demo: Demo, *, host: str, port: int | None, log: LogFunction) -> None:
    """Serve the page until the process is interrupted. port: default the first free one from 7860.

    Raises ValueError if the port is taken.
    """
    blocks = page(demo)
    try:
        where = dict(server_name=host, server_port=port, share=False, quiet=True)
        _, address, _ = blocks.launch(**where, prevent_thread_lock=True)
    except OSError as error:
        raise ValueError(f"--port: {port} cannot be used on {host}: {error}") from error
    log(f"page: {address} (Ctrl-C ends it)")
    blocks.block_thread()


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError(NEEDED) from error
    return gradio


def _about(demo: Demo) -> str:
    """A line under the title."""
    shape = " x ".join(map(str, demo.student.config.shape))
    what = "sentences" if demo.sentences else "points" if demo.points else "samples"
    decoded = "" if demo.student.config.autoencoder is None and not demo.sentences else ", decoded"
    return f"A flowmap student; {what} of shape {shape}{decoded}. All columns start from the same noise."


def _name_parameters(draw: Any, names: list[str]) -> None:
    """Give the function the signature by which Gradio names the API's parameters."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    draw.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])


def _inputs(gradio: Any, demo: Demo) -> tuple[list[str], list[Any]]:
    """The names of the inputs that this student takes, and their components."""
    config = demo.student.config
    found: dict[str, Any] = {"seed": gradio.Number(0, label="seed", precision=0, min_width=90)}
    if not demo.points:
        found["num"] = gradio.Slider(1, MOST, 16, step=1, label="samples", min_width=140)
    if demo.classes:
        found["label"] = gradio.Dropdown(demo.classes, value=demo.classes[0], label="class", min_width=140)
    if config.text is not None:
        found["prompt"] = gradio.Textbox(label="prompt", min_width=280, scale=3)
    if config.guidance is not None:
        low, high, default = config.guidance
        found["guidance"] = gradio.Slider(
            low, max(high, default, low + 0.1), default, step=0.05, label="guidance scale"
        )
    for one in config.sentences.attributes:
        name = ATTRIBUTE + re.sub(r"\W", "_", one.name)
        found[name] = gradio.Dropdown([NONE, *one.known], value=NONE, label=one.name, min_width=120)
    return list(found), list(found.values())


def _arguments(names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of Demo.draw: the values of attributes are one of them."""
    given = dict(zip(names, values, strict=True))
    attributes = [given.pop(name) for name in names if name.startswith(ATTRIBUTE)]
    return {**given, "attributes": attributes}


def _heading(label: str, below: str = "&nbsp;") -> str:
    """The label of a column in Markdown, with a line below it."""
    return f"**{label}**  \n{below}"


def _outputs(gradio: Any, demo: Demo) -> list[Any]:
    """The caption and the samples of each column, in turn."""
    found: list[Any] = []
    with gradio.Row():
        for label in demo.labels:
            with gradio.Column(min_width=220):
                found.append(gradio.Markdown(_heading(label)))
                if demo.sentences:
                    found.append(gradio.Textbox(show_label=False, lines=16, interactive=False))
                else:
                    found.append(gradio.Image(show_label=False, format="png", interactive=False, buttons=[]))
    return found

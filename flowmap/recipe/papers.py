"""The papers behind what this package implements, for `flowmap cite`: title, use here, authors, year, arXiv number."""

import re

PAPERS = {
    "ayf": (
        "Align Your Flow",
        "objective ayf_emd, ayf_lmd, ayf_mixed, adversarial; autoguidance",
        "Sabour, Fidler, Kreis",
        2025,
        "2506.14603",
    ),
    "flow_matching": (
        "Flow matching for generative modeling",
        "objective flow_matching",
        "Lipman, Chen, Ben-Hamu, Nickel, Le",
        2022,
        "2210.02747",
    ),
    "meanflow": (
        "Mean flows for one-step generative modeling",
        "objective meanflow",
        "Geng, Deng, Bai, Kolter, He",
        2025,
        "2505.13447",
    ),
    "imeanflow": (
        "Improved mean flows",
        "objective meanflow, tangent student",
        "Geng, Lu, Wu, Shechtman, Kolter, He",
        2025,
        "2512.02012",
    ),
    "scm": (
        "Simplifying, stabilizing and scaling continuous-time consistency models",
        "objective scm",
        "Lu, Song",
        2024,
        "2410.11081",
    ),
    "self_distilled": (
        "How to build a consistency model",
        "objective esd, lsd, psd",
        "Boffi, Albergo, Vanden-Eijnden",
        2025,
        "2505.18825",
    ),
    "shortcut": (
        "One step diffusion via shortcut models",
        "objective shortcut",
        "Frans, Hafner, Levine, Abbeel",
        2024,
        "2410.12557",
    ),
    "freeflow": (
        "Flow map distillation without data",
        "objective freeflow",
        "Tong, Ma, Xie, Jaakkola",
        2025,
        "2511.19428",
    ),
    "dmd2": (
        "Improved distribution matching distillation",
        "objective score_distillation",
        "Yin, Gharbi, Park, et al.",
        2024,
        "2405.14867",
    ),
    "dmd": (
        "One-step diffusion with distribution matching distillation",
        "its gradient",
        "Yin, Gharbi, Zhang, et al.",
        2023,
        "2311.18828",
    ),
    "consistency": (
        "Consistency models",
        "objective consistency",
        "Song, Dhariwal, Chen, Sutskever",
        2023,
        "2303.01469",
    ),
    "cmt": ("CMT: mid-training for flow map models", "objective cmt", "Hu, Lai, Mitsufuji, Ermon", 2025, "2509.24526"),
    "r3gan": (
        "The GAN is dead; long live the GAN!",
        "loss of objective adversarial",
        "Huang, Gokaslan, Kuleshov, Tompkin",
        2025,
        "2501.05441",
    ),
    "autoguidance": (
        "Guiding a diffusion model with a bad version of itself",
        "",
        "Karras, Aittala, Kynkaanniemi, et al.",
        2024,
        "2406.02507",
    ),
    "edm2": (
        "Analyzing and improving the training dynamics of diffusion models",
        "power-function EMA",
        "Karras, et al.",
        2024,
        "2312.02696",
    ),
    "dit": ("Scalable diffusion models with transformers", "", "Peebles, Xie", 2022, "2212.09748"),
    "rectified_flow_pp": (
        "Improving the training of rectified flows",
        "objective rectified, coupling pairs",
        "Lee, Lin, Fanti",
        2024,
        "2405.20320",
    ),
    "lediflow": (
        "LeDiFlow: learned distribution-guided flow matching",
        "prior learned",
        "Zwick, Friederich, Beichter, et al.",
        2025,
        "2505.20723",
    ),
    "cmmd": (
        "Rethinking FID: towards a better evaluation metric",
        "metric mmd",
        "Jayasumana, Ramalingam, Veit, et al.",
        2024,
        "2401.09603",
    ),
    "instaflow": (
        "InstaFlow: one step is enough",
        "objective endpoint, student stacked, merges",
        "Liu, Zhang, Ma, Peng, Liu",
        2023,
        "2309.06380",
    ),
    "edm": (
        "Elucidating the design space of diffusion-based generative models",
        "networks, grids",
        "Karras, Aittala, et al.",
        2022,
        "2206.00364",
    ),
    "language_flow": (
        "Language rectified flow",
        "data text, coupling styles, objective text_elbo",
        "Zhang, Wu, Gong, Liu",
        2024,
        "2403.16995",
    ),
    "lora": (
        "LoRA: low-rank adaptation of large language models",
        "student.lora",
        "Hu, Shen, Wallis, et al.",
        2021,
        "2106.09685",
    ),
    "ctm": ("Consistency trajectory models", "gamma-sampling", "Kim, Lai, Liao, et al.", 2024, "2310.02279"),
}


def papers_of(objective: str) -> list[str]:
    """The arXiv numbers of the papers behind an objective of that kind; none if it is not of a kind of ours."""
    listed = re.compile(rf"objective (\w+, )*{re.escape(objective)}\b")
    return [number for _, here, _, _, number in PAPERS.values() if objective and listed.search(here)]

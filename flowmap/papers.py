"""What to cite for what this package does: title (and what it is here), authors, year, arXiv number; `flowmap cite` prints it."""

PAPERS = {
    "ayf": ("Align Your Flow (objective ayf_emd, ayf_lmd; autoguidance distillation)", "Sabour, Fidler, Kreis", 2025, "2506.14603"),
    "flow_matching": ("Flow matching for generative modeling (objective flow_matching)", "Lipman, Chen, Ben-Hamu, Nickel, Le", 2022, "2210.02747"),
    "meanflow": ("Mean flows for one-step generative modeling (objective meanflow)", "Geng, Deng, Bai, Kolter, He", 2025, "2505.13447"),
    "imeanflow": ("Improved mean flows (objective meanflow, tangent student)", "Geng, Lu, Wu, Shechtman, Kolter, He", 2025, "2512.02012"),
    "scm": ("Simplifying, stabilizing and scaling continuous-time consistency models (objective scm)", "Lu, Song", 2024, "2410.11081"),
    "self_distilled": ("How to build a consistency model (objective esd, lsd, psd)", "Boffi, Albergo, Vanden-Eijnden", 2025, "2505.18825"),
    "shortcut": ("One step diffusion via shortcut models (objective shortcut)", "Frans, Hafner, Levine, Abbeel", 2024, "2410.12557"),
    "freeflow": ("Flow map distillation without data (objective freeflow)", "Tong, Ma, Xie, Jaakkola", 2025, "2511.19428"),
    "consistency": ("Consistency models (objective consistency)", "Song, Dhariwal, Chen, Sutskever", 2023, "2303.01469"),
    "cmt": ("CMT: mid-training for flow map models (objective cmt)", "Hu, Lai, Mitsufuji, Ermon", 2025, "2509.24526"),
    "autoguidance": ("Guiding a diffusion model with a bad version of itself", "Karras, Aittala, Kynkaanniemi, et al.", 2024, "2406.02507"),
    "edm2": ("Analyzing and improving the training dynamics of diffusion models (power-function EMA)", "Karras et al.", 2024, "2312.02696"),
    "dit": ("Scalable diffusion models with transformers", "Peebles, Xie", 2022, "2212.09748"),
    "rectified_flow_pp": ("Improving the training of rectified flows (objective rectified, coupling pairs)", "Lee, Lin, Fanti", 2024, "2405.20320"),
    "instaflow": ("InstaFlow: one step is enough (objective endpoint, student stacked, merges)", "Liu, Zhang, Ma, Peng, Liu", 2023, "2309.06380"),
    "edm": ("Elucidating the design space of diffusion-based generative models (networks, grids)", "Karras, Aittala, et al.", 2022, "2206.00364"),
    "language_flow": ("Language rectified flow (data text, coupling styles, objective text_elbo)", "Zhang, Wu, Gong, Liu", 2024, "2403.16995"),
    "lora": ("LoRA: low-rank adaptation of large language models (student.lora)", "Hu, Shen, Wallis, et al.", 2021, "2106.09685"),
    "ctm": ("Consistency trajectory models (gamma-sampling)", "Kim, Lai, Liao, et al.", 2024, "2310.02279"),
}

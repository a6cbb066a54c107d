"""A page to try a student in the browser: `flowmap demo`, and the app of an exported Space. It needs the extra `demo`.

demo = open_demo("runs/digits/student")
page(demo).launch()
"""

from __future__ import annotations

from flowmap.demo.draw import Demo, open_demo
from flowmap.demo.page import page, serve

__all__ = ["Demo", "open_demo", "page", "serve"]

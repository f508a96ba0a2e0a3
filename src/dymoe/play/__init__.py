"""A local page on which a person asks a learned run, stage by stage, and sees which experts serve each token.

`ask.py` answers and routes without knowing the page, `overlay.py` draws the routing as HTML, `page.py` is the page,
`guard.py` says what may reach it, `serve.py` listens. `page.py` and `serve.py` alone import Gradio, which is optional.
"""

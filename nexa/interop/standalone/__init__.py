"""Two modules that `nexa export` copies into a folder: they need torch and transformers, and not nexa.

They compute what `nexa.model` computes, from the resolved plan of each block in `config.json` rather than from the
name of a placement. `tests/interop/test_standalone.py` holds them equal for every placement, kind and option.
"""

"""Checkpoints that any layout writes and any other reads: see docs/checkpoints.md.

Modules, from the bottom: `files` (durable writes), `safetensors_io` (the tensor format), `fragment` (what a rank
owns), `layout` (who writes what), `exchange` (fragments to their writers), `commit` (the files of one save),
`save` (the writer a trainer uses), `catalog` (find and verify, without torch), `load` (read into any layout).
"""

"""Processes, groups and the ZeRO engine: the only place that imports DeepSpeed."""

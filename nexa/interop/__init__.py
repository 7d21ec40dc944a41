"""Hugging Face: `config.json` both ways, a transformers model for every placement, and its registration."""

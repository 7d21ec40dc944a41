"""Corpus -> tokens -> packed store -> mixture -> batches. Knows neither the training loop nor DeepSpeed."""

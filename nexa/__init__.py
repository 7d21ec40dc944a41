"""nexa: one trainer for people who study and run LLM pre-training."""

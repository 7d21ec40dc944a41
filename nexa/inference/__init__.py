"""What a trained model is for: sampling text and scoring text."""

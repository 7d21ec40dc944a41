"""How the loss depends on parameters, tokens, repetition and the mixture. Knows neither the loop nor the engine."""

"""The experts of a mixture-of-experts model as separate linear layers."""

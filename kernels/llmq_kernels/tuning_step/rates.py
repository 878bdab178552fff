"""Adam's constants in tuning."""

MEAN_DECAY, SQUARE_DECAY = 0.9, 0.95  # β
EPSILON = 1e-12  # the gradient of a mean over tokens and the vocabulary is small itself

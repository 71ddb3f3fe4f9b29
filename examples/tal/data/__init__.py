"""Videos, their annotations, and the windows that a network sees of them."""

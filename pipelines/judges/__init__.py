"""Networks that evaluate samples: perceptual distances and rewards."""

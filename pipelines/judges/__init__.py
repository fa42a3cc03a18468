"""Networks that judge samples: perceptual distances and rewards."""

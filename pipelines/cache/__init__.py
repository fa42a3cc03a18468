"""Prompt embeddings, latents and the teacher's samples on disk."""

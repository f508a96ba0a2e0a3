"""How the pocket streams and the pocket model's projector were made."""

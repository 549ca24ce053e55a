"""The standalone worker."""

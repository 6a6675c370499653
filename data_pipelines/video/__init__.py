"""Video and image files to uint8 arrays and back."""

"""Small trained models that ship with sparke, to try things on in seconds and to measure with."""

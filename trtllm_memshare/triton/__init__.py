"""Deployment on Triton Inference Server: the two python-backend models, the model repository, the launcher."""

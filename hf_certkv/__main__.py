"""`python -m hf_certkv`, and `accelerate launch -m hf_certkv`: the `certkv` command."""

from .cli import app

app()

"""`certkv matrix`: every causal language model of the installed transformers, in every mode, against its own cache."""

"""The soundness laboratory: attacks on the certificate that anyone can run (`certkv verify`). Needs the extra `verify`."""

"""vLLM engine hosts, the protocol spoken with them, and the transfer of weights to them."""

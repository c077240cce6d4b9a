"""See AsyPPO train on this machine's GPU: ``bash scripts/accept_gpu.sh``."""

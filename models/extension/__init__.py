"""Methods that MoE-LPR is compared with, and the extension of Lory models."""

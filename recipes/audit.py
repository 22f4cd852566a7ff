"""The script of `hf_transfer_ext.recipes.audit`, for `accelerate launch recipes/audit.py` in a clone."""

from hf_transfer_ext.recipes.audit import main
from hf_transfer_ext.recipes.run import run_recipe

if __name__ == "__main__":
    run_recipe("audit", main)

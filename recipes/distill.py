"""The script of `hf_transfer_ext.recipes.distill`, for `accelerate launch recipes/distill.py` in a clone."""

from hf_transfer_ext.recipes.distill import main
from hf_transfer_ext.recipes.run import run_recipe

if __name__ == "__main__":
    run_recipe("distill", main)

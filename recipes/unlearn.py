"""The script of `hf_transfer_ext.recipes.unlearn`, for `accelerate launch recipes/unlearn.py` in a clone."""

from hf_transfer_ext.recipes.run import run_recipe
from hf_transfer_ext.recipes.unlearn import main

if __name__ == "__main__":
    run_recipe("unlearn", main)

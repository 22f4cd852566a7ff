"""The script of `hf_transfer_ext.recipes.robustify`, for `accelerate launch recipes/robustify.py` in a clone."""

from hf_transfer_ext.recipes.robustify import main
from hf_transfer_ext.recipes.run import run_recipe

if __name__ == "__main__":
    run_recipe("robustify", main)

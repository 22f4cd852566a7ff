"""The script of `hf_transfer_ext.recipes.evaluate`, for `accelerate launch recipes/evaluate.py` in a clone."""

from hf_transfer_ext.recipes.evaluate import main
from hf_transfer_ext.recipes.run import run_recipe

if __name__ == "__main__":
    run_recipe("evaluate", main)

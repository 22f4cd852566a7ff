"""The script of `hf_transfer_ext.recipes.merge`, for `accelerate launch recipes/merge.py` in a clone."""

from hf_transfer_ext.recipes.merge import main
from hf_transfer_ext.recipes.run import run_recipe

if __name__ == "__main__":
    run_recipe("merge", main)

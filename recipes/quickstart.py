"""The script of `hf_transfer_ext.recipes.quickstart`, for `accelerate launch recipes/quickstart.py` in a clone."""

from hf_transfer_ext.recipes.quickstart import main
from hf_transfer_ext.recipes.run import run_recipe

if __name__ == "__main__":
    run_recipe("quickstart", main)

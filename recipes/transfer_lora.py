"""The script of `hf_transfer_ext.recipes.transfer_lora`, for `accelerate launch recipes/transfer_lora.py`."""

from hf_transfer_ext.recipes.run import run_recipe
from hf_transfer_ext.recipes.transfer_lora import main

if __name__ == "__main__":
    run_recipe("transfer_lora", main)

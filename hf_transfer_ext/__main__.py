"""`python -m hf_transfer_ext COMMAND ...`, and the same under `accelerate launch -m`."""

from hf_transfer_ext.cli import run

if __name__ == "__main__":
    run()

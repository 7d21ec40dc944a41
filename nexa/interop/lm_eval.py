"""lm-evaluation-harness that knows nexa's models: `python -m nexa.interop.lm_eval` takes the arguments of `lm_eval`.

Importing nexa registers its architectures with transformers, so that a checkpoint opens as it stands, whatever its
placement, without trust_remote_code.
"""

from __future__ import annotations

from nexa.errors import UserError, exit_on_user_error


def main() -> None:
    """Run the harness on the process's arguments. Ends with code 2 when it is not installed."""
    with exit_on_user_error():
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise UserError(f"lm-evaluation-harness cannot be imported ({error}); pip install 'lm_eval[hf]'") from None
    cli_evaluate()


if __name__ == "__main__":
    main()

"""Serve the exported model over HTTP as OpenAI's API, on this machine only.

    python -m tools.serve --port 8000

http://127.0.0.1:8000 is a page to try the model; clients take http://127.0.0.1:8000/v1 as base URL. docs/how-to/serve.md has examples.
Needs what `make serve` installs (envs/serve.lock).
"""

from slmake import cli, exported_model, params, serve
from slmake.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    exported_model.add_arguments(parser)
    serve.add_arguments(parser)
    args = parser.parse_args(argv)
    with cli.job("serve", args.log):
        try:
            serve.serve(exported_model.load(args), params.section(args.params, "package").name, args)
        except cli.Interrupted:
            return  # it was stopped, which is how a server ends
        except ImportError as error:
            raise UserError(f"{error.name} is not installed. Run `make serve`.") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{error}") from None


if __name__ == "__main__":
    main()

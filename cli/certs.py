"""`sightline certs`: an authority for development, the certificates it signs, and bearer tokens.

    sightline certs authority certs
    sightline certs issue certs cloud --dns cloud.example.org --ip 127.0.0.1
    sightline certs issue certs edge-north --uri spiffe://example.org/edge/north
    sightline certs token certs/console.token console        # and the line for the policy

Issuing again under the same name renews in place; services that run notice.
"""

from pathlib import Path
from typing import Annotated

import typer

from shared.errors import InvalidInput

CA = "ca"
Folder = Annotated[Path, typer.Argument(help="Folder of the authority; made if missing.", file_okay=False)]

certs = typer.Typer(no_args_is_help=True)


@certs.command()
def authority(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Common name, for people.")] = "Sightline development authority",
    days: Annotated[float, typer.Option(min=1, help="How long it is good for, days.")] = 3650,
) -> None:
    """Make a certificate authority: ca.pem, which everybody may have, and ca.key, which signs."""
    from shared.rpc import certificates

    certificate, key = folder / f"{CA}.pem", folder / f"{CA}.key"
    for path in (certificate, key):
        if path.exists():
            raise InvalidInput(f"{path} is there already; every certificate that it signed would end with it")
    folder.mkdir(parents=True, exist_ok=True)
    certificates.write(certificates.authority(name, days), certificate, key)
    print(f"{certificate}\n{key}")


@certs.command()
def issue(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Names the files: NAME.pem and NAME.key.")],
    uri: Annotated[list[str] | None, typer.Option(help="Identity of a caller: spiffe://...")] = None,
    dns: Annotated[list[str] | None, typer.Option(help="DNS name that a server is called by.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="IP address that a server is called by.")] = None,
    days: Annotated[float, typer.Option(min=0.001, help="How long it is good for, days.")] = 90,
) -> None:
    """Sign a certificate for a server or a caller, or renew it in place."""
    from shared.rpc import certificates

    if not name or name == CA or Path(name).name != name:
        raise InvalidInput(f"expected the name of a file other than {CA}, got {name!r}")
    signer = certificates.Pair((folder / f"{CA}.pem").read_bytes(), (folder / f"{CA}.key").read_bytes())
    names = certificates.Names(name, uri or (), dns or (), ip or ())
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificates.write(certificates.issue(signer, names, days), certificate, key)
    print(f"{certificate}\n{key}")


@certs.command()
def token(
    file: Annotated[Path, typer.Argument(help="File that gets the token; its caller reads it.", dir_okay=False)],
    name: Annotated[str, typer.Argument(help="Its identity will be token:NAME.")],
) -> None:
    """Make a bearer token, and print the line for the policy's [tokens], which holds its SHA-256 only."""
    import secrets

    from shared.rpc.policy import Policy, token_hash

    made = secrets.token_urlsafe(32)
    line = f'{name} = "{token_hash(made)}"'
    Policy.parse(f"[tokens]\n{line}\n".encode())  # the name is one that the policy takes
    file.unlink(missing_ok=True)
    file.touch(0o600)
    file.write_text(made + "\n")
    print(line)

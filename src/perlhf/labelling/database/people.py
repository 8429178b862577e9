"""Who labels, in a transaction of the database."""

import secrets

import sqlalchemy as sa

from perlhf.labelling.database.tables import LABELLERS, labeller_of
from perlhf.labelling.labels import Labeller


def everybody(connection: sa.Connection) -> list[Labeller]:
    """In the order in which they came."""
    return [labeller_of(row) for row in connection.execute(sa.select(LABELLERS).order_by(LABELLERS.c.id))]


def named(connection: sa.Connection, name: str, now: float) -> Labeller:
    """The person of this name; made if there is none."""
    row = connection.execute(sa.select(LABELLERS).where(LABELLERS.c.name == name)).one_or_none()
    return new(connection, name, now) if row is None else labeller_of(row)


def new(connection: sa.Connection, name: str, now: float, pseudonym: str | None = None) -> Labeller:
    """A person, whose pseudonym is drawn unless it is given."""
    row = {"name": name, "pseudonym": pseudonym or f"labeller-{secrets.token_hex(4)}", "since": now}
    made = connection.execute(sa.insert(LABELLERS).values(**row)).inserted_primary_key
    assert made is not None
    return Labeller(made[0], name, row["pseudonym"])

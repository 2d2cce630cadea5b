# SPDX-License-Identifier: Apache-2.0

"""Functions of ours in PostgreSQL, in PL/Python: what they are, and putting them in and out.

Each body only finds pydedup and calls ``pydedup.sql.inside_postgres``. They are STABLE: what they
read of the store is what the query that calls them sees, so that no alias moves within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from pydedup.errors import ArgumentError, ReadOnlyError, StoreError

from ._base import DbApiBase
from ._errors import DeniedError
from ._postgres_url import Place
from ._rows import words_of
from ._sessions import WRITE

__all__ = ["PostgresFunctions"]


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    parameters: str
    returns: str
    call: str

    @property
    def signature(self) -> str:
        types = (parameter.split()[-1] for parameter in self.parameters.split(", "))
        return f"{self.name}({', '.join(types) if self.parameters else ''})"


_FUNCTIONS: Final = (
    _Function(
        "pydedup_predict", "model text, VARIADIC features float8[]", "float8",
        "predict(model, features)",
    ),
    _Function(
        "pydedup_predict_array", "model text, features float8[]", "float8[]",
        "predict_array(model, features)",
    ),
    _Function(
        "pydedup_predict_many", "model text, features float8[]", "SETOF float8[]",
        "predict_many(model, features)",
    ),
    _Function(
        "pydedup_predict_blob", "model text, features bytea", "bytea",
        "predict_blob(model, features)",
    ),
    _Function(
        "pydedup_predict_json", "model text, features jsonb", "jsonb",
        "predict_json(model, features)",
    ),
    _Function("pydedup_model", "model text", "text", "model(model)"),
    _Function("pydedup_version", "", "text", "version()"),
)  # fmt: skip

_EXTENSION: Final = "CREATE EXTENSION IF NOT EXISTS plpython3u"
_SUPERUSER: Final = "SELECT rolsuper, rolname FROM pg_roles WHERE rolname = current_user"
_AVAILABLE: Final = "SELECT 1 FROM pg_available_extensions WHERE name = 'plpython3u'"
_VERSION: Final = "SELECT CAST(current_setting('server_version_num') AS integer) / 10000"


class PostgresFunctions(DbApiBase):
    """Putting functions into the schema of a store."""

    _place: Place

    def function_statements(self, python_path: str | None) -> list[str]:
        """Return the statements that make the functions. Raises ArgumentError for a bad path."""
        schema = self._place.schema
        statements = [_EXTENSION]
        for function in _FUNCTIONS:
            statements.append(
                f'CREATE OR REPLACE FUNCTION "{schema}".{function.name}({function.parameters}) '
                f"RETURNS {function.returns} LANGUAGE plpython3u STABLE STRICT "
                f"PARALLEL RESTRICTED COST 10000 AS $pydedup$"
                f"{_body(schema, python_path)}"
                f"return functions.{function.call}\n$pydedup$"
            )
        return statements

    def drop_statements(self) -> list[str]:
        """Return the statements that take the functions out again; the language stays."""
        schema = self._place.schema
        return [f'DROP FUNCTION IF EXISTS "{schema}".{f.signature}' for f in _FUNCTIONS]

    def install_functions(self, python_path: str | None) -> str:
        """Make the functions, see that one works, and return the server's version of pydedup.

        All of it or nothing. Raises StoreError when the user is no superuser, the server has no
        PL/Python, or its Python does not find pydedup.
        """
        statements = self.function_statements(python_path)
        self._refuse_unless_superuser()
        if not self._query(_AVAILABLE):
            ((number,),) = self._query(_VERSION)
            raise StoreError(
                f"{self._url}: the server has no PL/Python; install it there (Debian: apt-get "
                f"install postgresql-plpython3-{number}) and run this again"
            )
        with self._scope(WRITE, self._sql.dialect.begin_write):
            # One at a time: two that make the language, or a function, at once are an error.
            for statement in self._sql.dialect.lock_schema:
                self._write(statement)
            for statement in statements:
                self._write(statement.replace("%", "%%"))  # a folder may have one in its name
            try:
                ((version,),) = self._query(f'SELECT "{self._place.schema}".pydedup_version()')
            except StoreError as error:
                said = words_of(error.__cause__ or error)
                raise StoreError(
                    f"{self._url}: the Python of the server cannot import pydedup: {said}; install "
                    "it for that Python into a folder that the server may read, and name the "
                    "folder with --python-path; nothing was changed"
                ) from error
        return str(version)

    def drop_functions(self) -> None:
        """Take the functions out. Raises ReadOnlyError when they are somebody else's."""
        try:
            with self._scope(WRITE, self._sql.dialect.begin_write):
                for statement in (*self._sql.dialect.lock_schema, *self.drop_statements()):
                    self._write(statement)
        except DeniedError as error:
            raise ReadOnlyError(
                f"{self._url}: {words_of(error.__cause__ or error)}; let the owner of schema "
                f"{self._place.schema}, or an administrator, run this command"
            ) from error

    def _refuse_unless_superuser(self) -> None:
        ((is_superuser, role),) = self._query(_SUPERUSER)
        if not is_superuser:
            raise ReadOnlyError(
                f"{self._url}: user {role} is no superuser, and only one may make functions in "
                "plpython3u, which run with the rights of the server's own account; let an "
                "administrator run this command, or what `pydedup sql show` prints"
            )


def _body(schema: str, python_path: str | None) -> str:
    """Return the beginning of a function."""
    lines = ["", "functions = GD.get('pydedup', {}).get('" + schema + "')", "if functions is None:"]
    if python_path is not None:
        place = PurePosixPath(python_path)
        if not place.is_absolute() or not python_path.isprintable() or "$" in python_path:
            raise ArgumentError(
                f"--python-path {python_path!r} must be an absolute path on the server, of "
                "printable characters and without $"
            )
        lines += ["    import sys", f"    if {python_path!a} not in sys.path:"]
        lines += [f"        sys.path.insert(0, {python_path!a})"]
    lines += [
        "    import os",
        "    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')",
        "    import pydedup.sql",
        f"    functions = pydedup.sql.inside_postgres(GD, plpy, '{schema}')",
    ]
    return "\n".join(lines) + "\n"

# SPDX-License-Identifier: Apache-2.0
"""MySQL/MariaDB: users whom the server lets in no more for the time being, and what they are told.

Each was told nothing but the number, or what does not help.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pydedup
from pydedup import registry
from pydedup.errors import UnavailableError


def test_a_locked_account_is_told_who_unlocks_it(url: str, user: Any, run: Any) -> None:
    """MariaDB's was told to come from another host."""
    user.grant("ALL")
    run(url, f"ALTER USER {user.name} ACCOUNT LOCK")
    with pytest.raises(UnavailableError, match=r"locked\.?; .* ALTER USER \.\.\. ACCOUNT UNLOCK"):
        registry.connect(user.url, mode="a")
    run(url, f"ALTER USER {user.name} ACCOUNT UNLOCK")
    registry.connect(user.url, mode="a").close()


def test_too_many_wrong_passwords_are_told(
    url: str, user: Any, run: Any, of_mysql: bool, request: pytest.FixtureRequest
) -> None:
    """The right one is refused then; that was an unknown error of the store."""
    user.grant("ALL")
    if of_mysql:
        advice, unlock = "ACCOUNT UNLOCK", f"ALTER USER {user.name} ACCOUNT UNLOCK"
        run(url, f"ALTER USER {user.name} FAILED_LOGIN_ATTEMPTS 1 PASSWORD_LOCK_TIME 1")
    else:
        advice, unlock = "FLUSH PRIVILEGES", "FLUSH PRIVILEGES"
        run(url, "SET GLOBAL max_password_errors = 1")
        request.addfinalizer(lambda: run(url, "SET GLOBAL max_password_errors = DEFAULT"))
    for _ in range(2):  # MySQL tells it by the last wrong one already
        with pytest.raises(UnavailableError):
            registry.connect(user.url_with("wrong"), mode="a")
    with pytest.raises(UnavailableError, match=f"blocked .*; .*{advice}"):
        registry.connect(user.url, mode="a")
    run(url, unlock)
    registry.connect(user.url, mode="a").close()


def test_a_limit_of_an_hour_is_no_limit_of_connections(url: str, user: Any, run: Any) -> None:
    user.grant("ALL")
    run(url, f"ALTER USER {user.name} WITH MAX_CONNECTIONS_PER_HOUR 1")
    registry.connect(user.url, mode="a").close()
    with pytest.raises(UnavailableError, match=r"_per_hour'.* wait for the hour to pass") as caught:
        registry.connect(user.url, mode="a")
    assert "max_connections of the server" not in str(caught.value)


def test_a_server_in_offline_mode_is_waited_for(
    url: str, user: Any, run: Any, of_mysql: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That was an unknown error of the store; reading did not go on when it was over."""
    if not of_mysql:
        pytest.skip("MariaDB has no such mode")
    monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 0.1)
    user.grant("ALL")
    with pydedup.open(user.url) as store:
        store.add("m", {"w": np.ones(3, np.float32)})
        run(url, "SET GLOBAL offline_mode = ON")
        try:
            for use in (store.models, lambda: registry.connect(user.url, mode="a")):
                with pytest.raises(UnavailableError, match="SET GLOBAL offline_mode = OFF"):
                    use()
            monkeypatch.setattr("pydedup.adapters._again.AGAIN_SECONDS", 100.0)
            pause = []

            def sleep(_: float) -> None:
                if not pause:
                    run(url, "SET GLOBAL offline_mode = OFF")
                pause.append(1)

            monkeypatch.setattr("pydedup.adapters._again.time.sleep", sleep)
            assert [info.name for info in store.models()] == ["m"]
            assert pause
        finally:
            run(url, "SET GLOBAL offline_mode = OFF")

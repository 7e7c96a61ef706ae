"""Settings of the service as the outside sees it, from environment variables THUMBWHEEL_*."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def split(value: Any) -> Any:
    """ "a, b c" -> ("a", "b", "c")."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)]


class Settings(BaseSettings):
    """Lists are separated by commas or spaces.

    require_keys: ask for keys on loopback too (a reverse proxy connects from loopback). public_names: host names that are
    answered, beside loopback's. trusted_proxies: addresses whose X-Forwarded-For and X-Forwarded-Proto are believed.
    cors_origins: origins of other sites whose scripts may call the API. visitor_scopes: what somebody without a key may
    do on the page where keys are asked for: chat, rate, or nothing. body_limit: bytes of a request. body_seconds: how
    long a request's body may take to arrive. key_rate, address_rate: requests a second, key_burst, address_burst: so many
    at once; a rate of 0 is no limit.

    engine_url: a server of OpenAI's chat completions that answers instead of our decoder, up to /v1; engine_model: one of
    its models, without it the first that it lists; engine_key: what it asks for; engine_seconds: how long it may be
    silent; engine_max_tokens: of an answer, where the request says nothing.

    gold_rate: the share of labelling tasks whose right order is known; at 1, nothing else is handed out. lease_minutes: for
    how long a task is kept for who was given it. guideline: the team's labelling guideline, a markdown file.
    """

    model_config = SettingsConfigDict(env_prefix="THUMBWHEEL_", extra="ignore", frozen=True, env_ignore_empty=True)

    require_keys: bool = False
    public_names: Names = ()
    trusted_proxies: Names = ()
    cors_origins: Names = ()
    visitor_scopes: Names = ()
    body_limit: int = Field(default=2 * 1024 * 1024, ge=1024)
    body_seconds: float = Field(default=30.0, gt=0)
    key_rate: float = Field(default=100.0, ge=0)
    key_burst: int = Field(default=400, ge=1)
    address_rate: float = Field(default=20.0, ge=0)
    address_burst: int = Field(default=120, ge=1)
    engine_url: str = ""
    engine_model: str = ""
    engine_key: SecretStr | None = None
    engine_seconds: float = Field(default=60.0, gt=0)
    engine_max_tokens: int = Field(default=1024, ge=1)
    gold_rate: float = Field(default=0.1, ge=0, le=1)
    lease_minutes: float = Field(default=30.0, gt=0, le=24 * 60)
    guideline: Path | None = None

    @field_validator("visitor_scopes")
    @classmethod
    def few_scopes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Strangers may chat and rate; everything else needs a key."""
        if wrong := sorted(set(value) - {"chat", "rate"}):
            raise ValueError(
                f"a visitor without a key may have chat and rate, not {', '.join(wrong)}: make a key for it"
            )
        return value

    @field_validator("cors_origins")
    @classmethod
    def whole_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """https://name[:port], nothing behind it."""
        for origin in value:
            scheme, sign, host = origin.partition("://")
            if scheme not in ("http", "https") or not sign or not host or "/" in host or "*" in host:
                raise ValueError(f"{origin!r} is no origin: write https://name or https://name:port")
        return value

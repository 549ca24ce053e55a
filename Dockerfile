# One image for the API, the worker and migrations: the command says which. Nothing secret is in it;
# docs/configuration.md lists the environment variables.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY worker worker
COPY outwake outwake
COPY sql sql
COPY embedded embedded
RUN python -m venv /opt/outwake \
 && /opt/outwake/bin/pip install --no-cache-dir --disable-pip-version-check '.[worker,api,otel,relay]'

# The agent of production, of the version that `make claude` tests; nothing else of Node's image is kept.
FROM node:22-slim AS agent
RUN npm install --global --prefix /opt/claude --no-audit --no-fund @anthropic-ai/claude-code@2.1.197

FROM python:3.13-slim
# git and ssh clone and push the sessions' repositories.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates git openssh-client \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 outwake \
 && install --directory --owner=outwake --group=outwake /var/lib/outwake/workspaces
COPY --from=build /opt/outwake /opt/outwake
COPY --from=agent /usr/local/bin/node /usr/local/bin/node
COPY --from=agent /opt/claude /opt/claude
ENV PATH=/opt/outwake/bin:/opt/claude/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OUTWAKE_WORKSPACE_ROOT=/var/lib/outwake/workspaces
# A number, so that Kubernetes' runAsNonRoot can check it.
USER 10001:10001
WORKDIR /var/lib/outwake
CMD ["outwake", "--help"]

# syntax=docker/dockerfile:1
# The service without its embedded stack: it uses the Kafka and PostgreSQL it is told about.

FROM python:3.13-slim AS dependencies
WORKDIR /build
COPY requirements-bootstrap.lock requirements-runtime.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements-bootstrap.lock
RUN python -m venv --without-pip /opt/venv \
    && uv pip install --no-cache --python /opt/venv/bin/python --require-hashes -r requirements-runtime.lock

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin credits
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /app
# The packages are run from where they are: an application, not a library to be installed.
COPY schemas/ schemas/
COPY catalog/ catalog/
COPY ledger/ ledger/
COPY receipts/ receipts/
COPY merchants/ merchants/
COPY workers/ workers/
COPY migrations/ migrations/
COPY console/ console/
COPY LICENSE ./
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CREDITS_WEB_BIND=0.0.0.0 \
    CREDITS_WEB_PORT=8080
RUN python -m compileall -q /app \
    && printf '#!/bin/sh\nexec python -m console.main "$@"\n' > /usr/local/bin/credits \
    && chmod 755 /usr/local/bin/credits
# By number, so that Kubernetes can tell that it is not root.
USER 10001
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "console.main"]
CMD ["worker"]

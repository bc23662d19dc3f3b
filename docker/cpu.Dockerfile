# A server on any CPU: docker build -f docker/cpu.Dockerfile -t memento-cpu .
FROM debian:bookworm-slim

RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/memento
COPY . /src
RUN /opt/memento/bin/pip install --no-cache-dir '/src[serve]'
RUN /opt/memento/bin/memento doctor
RUN useradd --create-home memento

USER memento
WORKDIR /home/memento
ENV PATH=/opt/memento/bin:$PATH OMP_NUM_THREADS=1
EXPOSE 30000
ENTRYPOINT ["memento"]
CMD ["serve", "demo", "--host", "0.0.0.0"]

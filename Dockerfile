# docker build --network=none -t recog-fast .
# wheels/ beside this file holds the wheels of torch, numpy, triton, cmake, ninja, pybind11, setuptools and wheel (tools/offline_wheel.sh says how
# to get them): nothing is downloaded here. BASE needs Python >= 3.11 with venv and, where no wheel is given, a C++ compiler.
ARG BASE=python:3.11
FROM ${BASE} AS build
COPY . /src
RUN sh /src/tools/offline_wheel.sh /src/wheels /opt/recog-fast && rm -rf /opt/recog-fast/dist

FROM ${BASE}
COPY --from=build /opt/recog-fast /opt/recog-fast
ENV PATH=/opt/recog-fast/bin:$PATH
# data workers hand batches over through /dev/shm: docker run --shm-size=8g --gpus all
ENTRYPOINT ["recog-fast"]
CMD ["doctor"]

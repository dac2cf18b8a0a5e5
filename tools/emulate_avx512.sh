#!/bin/sh
# Runs kernel_check on AVX-512 in the Bochs emulator, for developers whose CPU has none: ISAs avx512_bf16 (Sapphire Rapids),
# avx512_vnni and avx512, on a small Linux that boots from a CD image and writes to its serial port. Not part of CI: 10 minutes.
#   tools/emulate_avx512.sh FOLDER [CPU MODEL]     FOLDER gets the image and logs; models: bochs --help cpu
# Needs Bochs >= 3.0 for sapphire_rapids (Debian 13; BOCHS names another binary, BXSHARE its BIOS folder); 2.7 (Debian 12) has
# corei7_icelake_u and tigerlake (avx512, avx512_vnni). And on Debian: apt-get install busybox-static cpio xorriso isolinux
# syslinux-common bsdutils; the kernel out of linux-image-amd64's package: KERNEL=/boot/vmlinuz-...
set -eu
[ $# -ge 1 ] || { sed -n 2,8p "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
py=${PY:-$root/.venv/bin/python}
model=${2:-sapphire_rapids}
mkdir -p "$1/init/proc" "$1/iso/isolinux"
cd "$1"

"$py" -m cmake -G Ninja -S "$root" -B build -DPython_EXECUTABLE="$("$py" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$py" -m pybind11 --cmakedir)" -DCMAKE_EXE_LINKER_FLAGS=-static \
  -DCMAKE_MAKE_PROGRAM="$("$py" -c 'import os, ninja; print(os.path.join(ninja.BIN_DIR, "ninja"))')" >/dev/null
"$py" -m cmake --build build --target kernel_check
strip -o init/kernel_check build/kernel_check
mkdir -p init/bin
cp "$(command -v busybox)" init/bin/busybox
cat >init/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox grep -m1 "model name" /proc/cpuinfo
for isa in avx512_bf16 avx512_vnni avx512; do
  /kernel_check $isa all small
  echo "kernel_check $isa: exit code $?"
done
echo finished
/bin/busybox poweroff -f
INIT
chmod +x init/init
(cd init && find . | cpio --quiet -o -H newc | gzip) >iso/initrd.gz
cp "${KERNEL:-$(ls /boot/vmlinuz-* | tail -1)}" iso/vmlinuz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 iso/isolinux/
cat >iso/isolinux/isolinux.cfg <<'BOOT'
default check
prompt 0
label check
  kernel /vmlinuz
  append initrd=/initrd.gz console=ttyS0 mitigations=off nokaslr random.trust_cpu=on noxsaves clearcpuid=amx_tile,amx_bf16,amx_int8,xfd
BOOT
xorriso -as mkisofs -quiet -o boot.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table iso
cat >bochsrc <<BOCHS
display_library: term
cpu: model=$model, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=256, host=256
romimage: file=${BXSHARE:-/usr/share/bochs}/BIOS-bochs-latest
vgaromimage: file=${BXSHARE:-/usr/share/bochs}/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.out
log: bochs.log
clock: sync=none
panic: action=fatal
error: action=report
info: action=ignore
BOCHS

# Its display needs a terminal, which `script` makes; what counts comes over the serial port.
rm -f serial.out
TERM=xterm script -qfc "exec ${BOCHS:-bochs} -q -f bochsrc" terminal.out >/dev/null 2>&1 </dev/null &
emulator=$!
trap 'kill $emulator 2>/dev/null || true' EXIT
seconds=0
until grep -q "^finished" serial.out 2>/dev/null; do
  kill -0 $emulator 2>/dev/null && [ $seconds -lt "${LIMIT:-1800}" ] || break
  sleep 5
  seconds=$((seconds + 5))
done
cat serial.out
grep -q "^finished" serial.out && ! grep -q "FAILED\|exit code [13-9]" serial.out

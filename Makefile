# acme-step: the README's part BUILDING says what can be set here.
.POSIX:
.SUFFIXES:

PREFIX   = /usr/local
BINDIR   = $(PREFIX)/bin
DOCDIR   = $(PREFIX)/share/doc/acme-step

# The static program is a PIE.  Debian's musl-gcc makes a dynamic one of
# -static-pie, so the linker is told itself; musl's start code for it is
# rcrt1.o, and no other is needed, since nothing here has constructors.
# It relocates by the load address only: without --exclude-libs the linker
# for s390x would leave it symbols to look up.
# Debian's archive of BearSSL was built with glibc: --defsym replaces
# its checked functions with musl's plain ones. It has unwind tables, 10 KB
# that nothing here uses: the program is linked with a copy without them.
CC       = musl-gcc
CFLAGS   = -Oz -ffunction-sections -fdata-sections \
           -fno-asynchronous-unwind-tables
LDFLAGS  = -static -nostartfiles -l:rcrt1.o \
           -Wl,-pie,--no-dynamic-linker,--exclude-libs,ALL \
           -Wl,--defsym=__memcpy_chk=memcpy \
           -Wl,--defsym=__memset_chk=memset \
           -Wl,--defsym=__memmove_chk=memmove

# A source tree of BearSSL, built with $(CC), in place of the system's.
BEARSSL  =

WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
           -Wno-sign-conversion -Wstrict-prototypes -Wmissing-prototypes \
           -Wwrite-strings -Wvla -Wformat=2 -Wundef
HARDEN   = -fPIE -fstack-protector-strong \
           -Wl,-z,relro,-z,now,-z,noexecstack,-z,text
# x86 alone would put constants into pages of their own.
SMALL    = -s -Wl,--gc-sections,--build-id=none,-z,noseparate-code
SAN      = -g -fsanitize=address,undefined -fno-sanitize-recover=all

# $$inc and $$lib: where BearSSL's headers and archive are.
FIND     = set -e; if [ "$(BEARSSL)" ]; then \
		inc='$(BEARSSL)/inc' lib='$(BEARSSL)/build/libbearssl.a'; \
		[ -f "$$lib" ] || $(MAKE) -C '$(BEARSSL)' lib \
		    CC='$(CC)' LD='$(CC)'; \
	else \
		inc=/usr/include/bearssl; \
		lib=`$(CC) -print-file-name=libbearssl.a`; \
	fi
COMPILE  = -std=c99 $(WARN) -isystem "$$inc"

all: acme-step

acme-step: acme.c Makefile
	@$(FIND); set -x; \
	`$(CC) -print-prog-name=objcopy` -R .eh_frame "$$lib" $@.a; \
	$(CC) $(COMPILE) $(CFLAGS) $(HARDEN) $(SMALL) $(LDFLAGS) \
	    -o $@ acme.c $@.a; \
	rm -f $@.a

acme-step-san: acme.c Makefile
	@$(FIND); set -x; \
	cc $(COMPILE) -O1 $(SAN) -o $@ acme.c "$$lib"

deps:
	@sh ./test.sh deps

check: deps
	@$(MAKE) acme-step
	@sh ./test.sh

check-san: deps
	@$(MAKE) acme-step-san
	@sh ./test.sh check ./acme-step-san

# Tasks of test.sh for the program ...
demo check-initramfs check-faults check-load check-waits fuzz bench: deps
	@$(MAKE) acme-step
	@task=$@; sh ./test.sh "$${task#check-}"

# ... and for what they build.
check-cross check-old check-builds coverage lint:
	@task=$@; sh ./test.sh "$${task#check-}"

image: acme-step.tar

acme-step.tar: acme-step test.sh LICENSE
	sh ./test.sh image acme-step $@

install: acme-step
	mkdir -p '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(DOCDIR)'
	cp acme-step '$(DESTDIR)$(BINDIR)/'
	cp README LICENSE '$(DESTDIR)$(DOCDIR)/'

uninstall:
	rm -f '$(DESTDIR)$(BINDIR)/acme-step'
	rm -rf '$(DESTDIR)$(DOCDIR)'

clean:
	rm -rf acme-step acme-step.a acme-step-san acme-step.tar .cache

.PHONY: all deps demo check check-san check-cross check-initramfs check-old \
        check-builds check-faults check-load check-waits fuzz coverage lint \
        bench image install uninstall clean

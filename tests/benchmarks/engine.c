/* The smallest engine that tells when it began.
 *
 * engine STAMPS NAME TOKEN PORT: as the first thing it does it reads the clock (CLOCK_MONOTONIC, which all processes
 * share) and appends "NAME TOKEN PID NANOSECONDS" to STAMPS; then it answers every request on PORT with 200.
 * Linked statically, nothing runs between execve and the clock but the C library's own start, well under 0.1 ms.
 */
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (argc != 5)
        return 64;
    int stamps = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0600);
    dprintf(stamps, "%s %s %d %lld\n", argv[2], argv[3], getpid(), now.tv_sec * 1000000000LL + now.tv_nsec);
    close(stamps);

    static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[4]))};
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 16)) {
        perror("listen");
        return 1;
    }
    for (;;) {
        char request[4096];
        int connection = accept(listener, NULL, NULL);
        if (connection < 0)
            continue;
        if (read(connection, request, sizeof request) > 0 && write(connection, answer, sizeof answer - 1) < 0)
            perror("write");
        close(connection);
    }
}

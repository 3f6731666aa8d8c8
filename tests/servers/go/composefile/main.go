// Command composefile loads a Compose file as `docker compose` does and prints what it comes to, as JSON.
//
//	composefile FILE [NAME=VALUE ...]
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(file string, environment []string) error {
	// Neither .env nor this process's own variables: a result depends on the arguments alone.
	options, err := cli.NewProjectOptions(
		[]string{file}, cli.WithEnv(environment), cli.WithProfiles([]string{"*"}),
		cli.WithResolvedPaths(true), cli.WithConsistency(true), cli.WithInterpolation(true),
	)
	if err != nil {
		return err
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		return err
	}
	content, err := project.MarshalJSON()
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(content)
	return err
}

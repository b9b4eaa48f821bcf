# A web application on Puma and ActiveRecord that knows nothing but DATABASE_URL: each request is a transaction.
require 'active_record'

ActiveRecord::Base.establish_connection(ENV.fetch('DATABASE_URL'))
ActiveRecord::Schema.verbose = false

class Visit < ActiveRecord::Base
end

work = lambda do |path|
  visit = Visit.transaction do
    Visit.create!(path: path)
  end
  # A slow one is under way when SIGTERM comes.
  Visit.connection.execute('SELECT pg_sleep(1)') if path == '/slow'
  "#{Visit.find(visit.id).path}, process #{Process.pid}\n"
end

run(lambda do |env|
  text = ActiveRecord::Base.connection_pool.with_connection { work.call(env['PATH_INFO']) }
  [200, { 'content-type' => 'text/plain' }, [text]]
end)
